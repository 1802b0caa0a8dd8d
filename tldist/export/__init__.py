"""From a bundle to an ONNX package whose behaviour was proved equal, and the proof again at any time."""
