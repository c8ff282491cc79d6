"""Which layers of a plain module are the first and the last: by its forward, or else by channels."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation

import hf_daq

TRACED, GUESSED = "in the traced forward", "by its channels (the forward cannot be traced)"
FLOAT = {"weights": None, "weights_backbone": None}


def ends(model):
    rows = hf_daq.plan(model, bits=4).kept
    return {name: row.reason for name, row in rows.items() if row.reason.startswith(("first", "last"))}


def said(rule, first, last):
    return dict.fromkeys(first, f"first layer {rule}") | dict.fromkeys(last, f"last layer {rule}")


class TwoInputs(nn.Module):
    """Registered in another order than it computes; a residual path from the stem to the output, and two outputs."""

    def __init__(self):
        super().__init__()
        self.aux, self.head = nn.Linear(8, 3), nn.Linear(8, 2)
        self.block, self.extra = nn.Linear(8, 8), nn.Linear(5, 8)
        self.stem, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x, y):
        x = self.stem(x).view(x.shape[0], -1, 8) + self.extra(y)
        x = x + self.block(x)
        x = x + self.attention(x, x, x)[0]
        return {"out": self.head(x).softmax(-1), "aux": self.aux(x)}


class Headless(TwoInputs):
    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        return x + self.head(self.aux(self.extra(x)))


class Untraceable(nn.Module):
    """Two heads of several levels, after a network that was registered before them."""

    def __init__(self):
        super().__init__()
        self.scores = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1), nn.Conv2d(c, 24, 1)) for c in (16, 32))
        self.body = nn.ModuleList([nn.Conv2d(16, 32, 1), nn.Conv2d(32, 24, 1)])
        self.boxes, self.stem, self.qkv = nn.Conv2d(24, 9, 1), nn.Conv2d(3, 16, 3), nn.Linear(24, 72)

    def forward(self, x):
        if x.sum() > 0:
            return x


@pytest.mark.parametrize(
    ("build", "want"),
    [
        (TwoInputs, said(TRACED, ["stem", "extra"], ["head", "aux"])),
        (Headless, said(TRACED, ["stem"], ["head"])),
        (
            Untraceable,
            said(GUESSED, ["stem"], ["boxes", "qkv"]),
        ),
        (
            lambda: segmentation.fcn_resnet50(**FLOAT, aux_loss=True),
            said(TRACED, ["backbone.conv1"], ["classifier.4", "aux_classifier.4"]),
        ),
        (lambda: torchvision.models.vit_b_16(), said(TRACED, ["conv_proj"], ["heads.head"])),
        (lambda: torchvision.models.swin_t(), said(TRACED, ["features.0.0"], ["head"])),
        (
            lambda: detection.retinanet_resnet50_fpn(**FLOAT),
            said(
                GUESSED,
                ["backbone.body.conv1"],
                ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
            ),
        ),
        (
            lambda: detection.maskrcnn_resnet50_fpn(**FLOAT, num_classes=2),
            said(
                GUESSED,
                ["backbone.body.conv1"],
                [
                    "rpn.head.cls_logits",
                    "rpn.head.bbox_pred",
                    "roi_heads.box_predictor.cls_score",
                    "roi_heads.box_predictor.bbox_pred",
                    "roi_heads.mask_predictor.mask_fcn_logits",
                ],
            ),
        ),
        (
            lambda: detection.ssdlite320_mobilenet_v3_large(**FLOAT),
            said(
                GUESSED,
                ["backbone.features.0.0.0"],
                [f"head.{kind}_head.module_list.{i}.1" for kind in ("classification", "regression") for i in range(6)],
            ),
        ),
    ],
    ids=["two inputs", "headless", "untraceable", "fcn", "vit", "swin", "retinanet", "mask rcnn", "ssdlite"],
)
def test_what_reads_the_input_and_gives_the_output_stays_in_float(build, want):
    with torch.device("meta"):
        model = build()
    training = model.training
    assert ends(model) == want
    assert model.training is training
