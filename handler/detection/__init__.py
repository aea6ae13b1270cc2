"""Object detectors of torchvision, served as classifiers of whole images."""
