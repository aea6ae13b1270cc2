import torch
from rows_handler import RowsHandler


class InnerModule(RowsHandler):
    """A handler that also answers with the embedding of the first layer."""

    def inference(self, data):
        with torch.inference_mode():
            return self.model(data), self.model.first(data)

    def postprocess(self, data):
        scores, embeddings = data
        return [{**answer, "embedding": embedding.tolist()}
                for answer, embedding in zip(super().postprocess(scores), embeddings)]
