"""What becomes of a proved float32 graph: half precision or int8, step by step, each step measured."""
