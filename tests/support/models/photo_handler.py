"""TorchServe's own image classifier with the preprocessing of EfficientNet-Lite0."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class PhotoClassifier(ImageClassifier):
    """A handler that answers with the likeliest classes for a photo."""

    image_processing = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((127 / 255,) * 3, (128 / 255,) * 3)])
