"""TorchServe's own image classifier with the preprocessing of the digits."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class DigitsClassifier(ImageClassifier):
    """A handler that answers with the three likeliest digits for a 32x32 image."""

    topk = 3
    image_processing = transforms.Compose([transforms.Grayscale(), transforms.ToTensor(),
                                           transforms.Normalize(0.3, 0.35)])
