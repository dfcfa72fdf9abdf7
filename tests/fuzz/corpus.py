"""Damaged and unusual inputs, each a function of a random stream: nothing is stored."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
from typing import Any

from PIL import Image

_WORDS = (
    "a red circle", "two blue squares", "make it yellow", "", " ", "x" * 5000, "日本語の看板", "\u202eright to left",
    "emoji 🦊", "quote \" and '", "tab\tand\nline", "../../etc/passwd", "-red circle", "--out", "%s%n{0}", "NUL\0here",
    "<|image_pad|>", "null", "NaN", "1e999",
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 7, 31, 32, 33, 512, 10**6, 10**7, 2**31, 2**32, 2**63, -(2**63), 10**30)


def text(rng: random.Random) -> str:
    """A short text, often unusual; without lone surrogates, which a command line cannot hold."""
    if rng.random() < 0.7:
        return rng.choice(_WORDS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA0, 0xD800)))) for _ in range(rng.randrange(40))
    )


def number(rng: random.Random) -> int | float:
    """A number, often at the edge of a type."""
    return rng.choice(_NUMBERS) if rng.random() < 0.6 else rng.choice((rng.uniform(-2, 2), float(rng.randrange(100))))


def word(rng: random.Random) -> str:
    """A command-line value of any type."""
    choices = (
        lambda: str(number(rng)),
        lambda: text(rng).replace("\0", ""),
        lambda: rng.choice(
            ("true", "false", "none", "nan", "inf", "-inf", "[]", "{}", "[1,", '{"a":1}', "a,b", "1,2,3")
        ),
        lambda: rng.choice(("gs://bucket/x", "s3://b/y", "file:///x", "memory://z", "hf://m", ".")),
    )
    return rng.choice(choices)()


def value(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value."""
    kinds = ("text", "number", "constant") if depth == 0 else ("text", "number", "constant", "list", "object")
    match rng.choice(kinds):
        case "text":
            return text(rng)
        case "number":
            return number(rng)
        case "constant":
            return rng.choice((None, True, False))
        case "list":
            return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def deep(rng: random.Random) -> bytes:
    """JSON nested beyond the recursion limit."""
    depth = rng.choice((500, 3000, 100_000))
    return b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth


def damage(rng: random.Random, data: bytes) -> bytes:
    """Changes a file in one to three places: bits, cuts, repeats, numbers, zeros."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not out:
            break
        # Headers matter more than bodies.
        at = rng.randrange(min(len(out), 256)) if rng.random() < 0.5 else rng.randrange(len(out))
        size = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(out) - at)
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at : at + size] = bytes(size)
            case 4:
                out[at : at + size] = rng.randbytes(size)
            case 5:
                del out[at:]
    return bytes(out)


def image(rng: random.Random) -> tuple[str, bytes]:
    """(name, contents) of a picture: of any format, size and mode, intact or damaged, or not an image."""
    kind = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "EPS", "ICO", "PPM", "text", "bomb", "thin"))
    if kind == "text":
        return "text.png", text(rng).encode()
    if kind in ("bomb", "thin"):
        # A few bytes that declare a huge image.
        width, height = (1, 60_000_000) if kind == "thin" else (rng.choice((20_000, 60_000)),) * 2
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"x\x9c\x03\x00\x00\x00\x00\x01")
        return f"{kind}.png", chunks + _chunk(b"IEND", b"")
    mode = {"JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "1"), "EPS": ("RGB", "L"),
            "PPM": ("RGB", "L"), "GIF": ("P", "L")}.get(kind, ("RGB", "RGBA", "L", "P", "LA", "1", "I;16"))  # fmt: skip
    chosen = rng.choice(mode if kind in ("PNG", "TIFF") else tuple(m for m in mode if m not in ("LA", "I;16")))
    size = rng.choice(((32, 32), (96, 96), (1, 1), (1, 200), (640, 64), (257, 129)))
    picture = Image.new(chosen, size, rng.randrange(2) if chosen in ("1", "P", "L", "I;16") else None)
    settings: dict[str, Any] = {}
    if kind in ("GIF", "WEBP", "TIFF") and rng.random() < 0.4:
        settings = {"save_all": True, "append_images": [picture.copy() for _ in range(rng.randrange(1, 4))]}
    if kind in ("PNG", "JPEG", "TIFF", "WEBP") and rng.random() < 0.3:
        settings["icc_profile"] = rng.randbytes(rng.choice((0, 3, 128, 600)))
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    data = file.getvalue() if rng.random() < 0.4 else damage(rng, file.getvalue())
    return f"picture.{rng.choice((kind.lower(), 'png', 'jpg'))}", data


def _chunk(name: bytes, body: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


_FIELDS = (
    "prompt", "caption", "negative_prompt", "image", "images", "seed", "size", "width", "height", "id", "num_images",
    "steps", "guidance", "tag", "promt", "Prompt", "prompt_id", "index",
)  # fmt: skip


def prompts(rng: random.Random) -> tuple[str, bytes]:
    """(name, contents) of a prompt file."""
    suffix = rng.choice(("txt", "jsonl", "csv", "json", "parquet", "xyz"))
    rows = []
    for _ in range(rng.choice((0, 1, 3, 8))):
        row = {"prompt": text(rng)} if rng.random() < 0.7 else {}
        row |= {rng.choice(_FIELDS): value(rng, 1) for _ in range(rng.randrange(3))}
        rows.append(row)
    ends = rng.choice(("\n", "\r\n", "\r", "\u2028", "\x0c"))
    if suffix == "csv":
        body = ",".join(rng.sample(_FIELDS, 3)) + ends + ends.join(",".join(word(rng) for _ in range(3)) for _ in rows)
    elif suffix == "json":
        body = json.dumps(rows if rng.random() < 0.7 else value(rng))
    elif suffix == "txt":
        body = ends.join(str(row.get("prompt", "")) for row in rows)
    else:
        body = ends.join(json.dumps(row) if rng.random() < 0.8 else json.dumps(value(rng)) for row in rows)
    data = body.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = deep(rng)
    if rng.random() < 0.2:
        data = b"\xff\xfe" + body.encode("utf-16-le", "surrogatepass")
    if rng.random() < 0.2:
        data = b'{"prompt": "half \\ud800 pair"}\n' + data
    return f"prompts.{suffix}", data if rng.random() < 0.7 else damage(rng, data)


def tar(rng: random.Random) -> bytes:
    """A WebDataset shard, perhaps damaged."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i in range(rng.randrange(1, 5)):
            stem = rng.choice((f"{i:04d}", f"a.b/{i}", f".hidden{i}", "x" * 120 + str(i), f"../{i}"))
            for suffix, data in (
                (".png", image(rng)[1]),
                (".txt", text(rng).encode()),
                (".json", json.dumps(value(rng)).encode()),
            ):
                if rng.random() < 0.8:
                    info = tarfile.TarInfo(stem + suffix)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return file.getvalue() if rng.random() < 0.4 else damage(rng, file.getvalue())


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a semantically changed header and the same body."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    begin, end = entry["data_offsets"]
    match rng.randrange(9):
        case 0:
            entry["data_offsets"] = [begin - rng.choice((1, 8, length)), end]
        case 1:
            entry["data_offsets"] = [begin + rng.choice((1, 2, 16)), end]
        case 2:
            entry["data_offsets"] = [end, begin]
        case 3:
            entry["dtype"] = rng.choice(("F16", "F64", "I8", "BF16", "", None, 7, "F8_E4M3"))
        case 4:
            entry["shape"] = rng.choice(([-1], [0], None, "2x2", [2**62, 4], [1.5], [entry["shape"]]))
        case 5:
            header[rng.choice(names)] = value(rng, 1)
        case 6:
            other = header[rng.choice(names)]
            entry["data_offsets"] = other["data_offsets"] if isinstance(other, dict) else []
        case 7:
            header["__metadata__"] = value(rng, 1)
        case 8:
            entry[rng.choice(("data_offsets", "shape", "dtype"))] = value(rng, 1)
    text_ = json.dumps(header).encode()
    length = len(text_) if rng.random() < 0.9 else rng.choice((0, 2**40, len(text_) - 1, len(text_) + 10**6))
    return struct.pack("<Q", length) + text_ + data[8 + struct.unpack("<Q", data[:8])[0] :]


def recompressed(rng: random.Random, data: bytes) -> bytes:
    """A zip archive (as `torch.save` writes) with members compressed, renamed or dropped."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        members = source.infolist()
        dropped = rng.choice(members).filename if rng.random() < 0.3 else ""
        for member in members:
            if member.filename == dropped:
                continue
            method = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
            target.writestr(member.filename, source.read(member), method)
    return out.getvalue()
