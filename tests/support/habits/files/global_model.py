import json
import os

import torch
from rows_net import RowsNet

model = None


def handle(data, context):
    global model
    if model is None:
        folder = context.system_properties.get("model_dir")
        model = RowsNet()
        model.load_state_dict(torch.load(os.path.join(folder, "weights.pth")))  # noqa: PTH118 - as users write it
        model.eval()
    if not data:
        return None
    bodies = [item.get("data") or item.get("body") for item in data]
    rows = [json.loads(body) if isinstance(body, (bytes, bytearray)) else body for body in bodies]
    with torch.no_grad():
        scores = model(torch.tensor(rows, dtype=torch.float32))
    return [f"class {row.argmax().item()} with {row.softmax(dim=0).max().item():.2f}" for row in scores]
