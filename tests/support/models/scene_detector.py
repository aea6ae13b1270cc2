"""A Mask R-CNN for small scenes, with ResNet-18, a pyramid of 128 channels, and at most 50 proposals and 10 objects."""

from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN


class SceneDetector(MaskRCNN):
    def __init__(self) -> None:
        network = resnet18(weights=None, norm_layer=nn.BatchNorm2d)
        backbone = BackboneWithFPN(network, {f"layer{level + 1}": str(level) for level in range(4)},
                                   [64, 128, 256, 512], 128)
        anchors = AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((0.75, 1.0, 1.33),) * 5)
        super().__init__(backbone, num_classes=5, min_size=128, max_size=128, rpn_anchor_generator=anchors,
                         rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
                         rpn_post_nms_top_n_test=50, box_batch_size_per_image=32, box_detections_per_img=10)
