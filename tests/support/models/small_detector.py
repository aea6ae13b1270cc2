"""A Mask R-CNN that is fast enough for tests, with ResNet-18, few proposals, and images of 96 pixels."""

from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


class SmallDetector(MaskRCNN):
    def __init__(self) -> None:
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d,
                                       trainable_layers=5)
        super().__init__(backbone, num_classes=4, min_size=96, max_size=160, rpn_pre_nms_top_n_test=100,
                         rpn_post_nms_top_n_test=20, box_detections_per_img=5)
