"""The image service: an ASGI application in OpenAI's format over a batching queue, and the web page."""
