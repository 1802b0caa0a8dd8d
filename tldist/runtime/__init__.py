"""What runs in production: decode, preprocess, ONNX session, predict. NumPy, Pillow, ONNX Runtime."""
