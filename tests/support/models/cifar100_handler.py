"""TorchServe's own image classifier with the preprocessing of the CIFAR-100 weights."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class Cifar100Classifier(ImageClassifier):
    """A handler that answers with the scores of the hundred classes for a 32x32 PNG."""

    topk = 100
    image_processing = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))])
