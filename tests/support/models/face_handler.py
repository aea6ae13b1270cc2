"""TorchServe's own image classifier with the preprocessing of MobileFaceNet."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class FaceClassifier(ImageClassifier):
    """A handler that answers with the likeliest identities for a face."""

    image_processing = transforms.Compose([
        transforms.Resize((112, 96)), transforms.ToTensor(),
        transforms.Normalize((127.5 / 255,) * 3, (128 / 255,) * 3)])
