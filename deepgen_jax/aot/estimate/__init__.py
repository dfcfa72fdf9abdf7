"""Time and memory of a compiled program, estimated from its HLO."""
