"""Settings to start from, by name: what was published for each data set, and short runs that train in minutes.

Learning rates are for the batch given here; a smaller batch wants a smaller rate in proportion. ``steps`` are those of
the published epochs over the published training part. Where a recipe holds something that is not built here, the
comment says so.
"""

from typing import Any

_REID_256 = {"size": [256, 128], "batch": 64, "rotate": 0.0, "scale": 0.05, "shift": 0.08, "colour": 0.0, "grey": 0.0,
             "low_resolution": 0.0, "erase": 0.5}  # fmt: skip
_VITPOSE = {"size": [256, 192], "batch": 512, "lr": 5e-4, "weight_decay": 0.1, "layer_decay": 0.8, "drop_path": 0.1,
            "pose_head": "heatmap", "clip": 1.0, "scale": 0.5, "rotate": 40.0, "colour": 0.0, "grey": 0.0,
            "low_resolution": 0.0}  # fmt: skip
_PEDESTRIAN = {"batch": 64, "lr": 1.7e-4, "weight_decay": 5e-4, "rotate": 0.0, "scale": 0.05, "colour": 0.0,
               "grey": 0.0, "low_resolution": 0.0, "attribute_head": "linear"}  # fmt: skip
_PARSING = {"weight_decay": 0.0, "scale": 0.25, "rotate": 30.0, "colour": 0.0, "grey": 0.0, "low_resolution": 0.0}
_DETECTOR = {"lr": 1e-4, "weight_decay": 0.1, "layer_decay": 0.75, "drop_path": 0.1, "paste_share": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # HAP (Yuan et al., 2023) for a plain ViT: 100 epochs, 5 of warm-up, half identity and half triplet loss.
    "market1501": {**_REID_256, "lr": 8e-3, "layer_decay": 0.4, "drop_path": 0.1, "steps": 20_200, "warmup": 0.05},
    "msmt17": {**_REID_256, "lr": 8e-3, "layer_decay": 0.4, "drop_path": 0.1, "steps": 51_000, "warmup": 0.05},
    "cuhk03": {**_REID_256, "lr": 8e-3, "layer_decay": 0.4, "drop_path": 0.1, "steps": 11_500, "warmup": 0.05},
    # ViTPose-S (Xu et al., 2022): 210 epochs; it steps the rate at 170 and 200, here a cosine. No half-body views. It
    # pads boxes by a quarter and keeps proportions; crops here are the box itself, stretched, as other heads see them.
    "coco": {**_VITPOSE, "steps": 61_500, "warmup": 0.008},
    "aic": {**_VITPOSE, "steps": 155_000, "warmup": 0.003},
    "mpii": {**_VITPOSE, "size": [256, 256], "steps": 9_100, "warmup": 0.055},
    "crowdpose": {**_VITPOSE, "steps": 14_700, "warmup": 0.034},
    "humanart": {**_VITPOSE, "steps": 61_500, "warmup": 0.008},
    # HAP for pedestrian attributes: 55 epochs, running mean of the weights.
    "pa100k": {**_PEDESTRIAN, "size": [256, 192], "steps": 77_300, "ema_decay": 0.9999},
    "rapv2": {**_PEDESTRIAN, "size": [256, 192], "steps": 58_300, "ema_decay": 0.9999},
    "peta": {**_PEDESTRIAN, "size": [256, 192], "steps": 9_800, "ema_decay": 0.999},
    # DPAL's fork of SCHP for LIP: 150 epochs, 30 of warm-up. No edge branch and no self-correction.
    "lip": {**_PARSING, "size": [576, 384], "batch": 96, "lr": 7e-4, "steps": 47_600, "warmup": 0.2},
    # PATH (Tang et al., 2023) for CIHP: 480 pixels, 20 epochs.
    "cihp": {**_PARSING, "size": [480, 480], "batch": 64, "lr": 4e-4, "weight_decay": 0.1, "layer_decay": 0.75,
             "drop_path": 0.3, "steps": 8_800},
    "atr": {**_PARSING, "size": [576, 384], "batch": 96, "lr": 7e-4, "steps": 25_000, "warmup": 0.2},
    # ViTDet (Li et al., 2022): 36 epochs of large-scale jitter; at an edge size, so that a camera can run it.
    "crowdhuman": {**_DETECTOR, "detection_size": [640, 1024], "batch": 16, "steps": 33_750, "window": [10, 16]},
    "citypersons": {**_DETECTOR, "detection_size": [640, 1280], "batch": 16, "steps": 6_700, "window": [10, 16]},
    # Minutes on two CPU cores, from a distilled student.
    "short": {"batch": 48, "steps": 300, "lr": 1e-3, "layer_decay": 0.75, "ema_decay": 0.99, "save_every": 300},
    "short-detector": {"batch": 8, "steps": 300, "lr": 1e-3, "layer_decay": 0.75, "ema_decay": 0.99,
                       "detection_size": [256, 384], "save_every": 300},
}  # fmt: skip
