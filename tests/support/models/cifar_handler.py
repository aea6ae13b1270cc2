"""TorchServe's own image classifier with the preprocessing of the CIFAR weights."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class CifarClassifier(ImageClassifier):
    """A handler that answers with the scores of the ten classes for a 32x32 JPEG."""

    topk = 10
    image_processing = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
