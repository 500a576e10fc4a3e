"""Imported by the commands of the multimodal tests, which load a processor of images without torchvision.

transformers' AutoImageProcessor wants torchvision, which PyPI has for a torch with CUDA only. Without it the same
image processor of Pillow is named instead, as transformers itself does where a class is asked for by its name.
"""

from importlib.util import find_spec

from transformers import PaddleOCRVLProcessor

if find_spec("torchvision") is None:
    PaddleOCRVLProcessor.image_processor_class = "Qwen2VLImageProcessorPil"
