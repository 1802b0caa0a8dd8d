"""Classify images with an exported package, in 20 lines of ONNX Runtime, NumPy and Pillow.

    python run_package.py PACKAGE/model.onnx FOLDER       FOLDER/CLASS/IMAGE: a label for each image, then accuracy

Everything else lies in the graph's own metadata. The pixels are those that training saw: a JPEG is decoded at 1/2,
1/4 or 1/8 of its size where that is at least twice the size that it is resized to; the EXIF orientation is applied;
of 16 bits the upper 8 are kept; what is transparent lies on white. A package with input=picture resizes by itself.
"""
import json, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
how, classes = json.loads(about["preprocessing"]), json.loads(about["classes"])

def prepare(image):
    size = [max(how["resize"], how["height"], how["width"]) * side // min(image.size) for side in image.size]
    if image.format == "JPEG": image.draft(image.mode, [2 * side for side in size])
    image, size = ImageOps.exif_transpose(image), size[::-1] if image.getexif().get(0x0112, 1) > 4 else size
    if image.mode[0] in "IF": image = Image.fromarray((np.asarray(image) / (1 if image.mode == "F" else 256)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data: image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if about["input"] == "picture": return np.asarray(image.convert("RGB"))
    image = image.convert("RGB").resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((side - kept) / 2) for side, kept in zip(size, (how["width"], how["height"])))
    return np.asarray(image.crop((left, top, left + how["width"], top + how["height"])))

files = sorted(pathlib.Path(sys.argv[2]).glob("*/*"))
labels = [classes[session.run(["logits"], {"images": prepare(Image.open(file))[None]})[0].argmax()] for file in files]
print("\n".join(f"{file}\t{label}" for file, label in zip(files, labels)))
print(f"accuracy {np.mean([label == file.parent.name for file, label in zip(files, labels)]):.4f} on {len(files)} images")
