import json

from rows_handler import RowsHandler


class OwnStatuses(RowsHandler):
    """A handler that tells clients what is wrong with a request, and marks answers with a low confidence."""

    def handle(self, data, context):
        bodies = [item.get("data") or item.get("body") for item in data]
        rows = [json.loads(body) if isinstance(body, (bytes, bytearray)) else body for body in bodies]
        good = [position for position, row in enumerate(rows) if len(row) == 6]
        answers = [{"error": f"expected 6 numbers, found {len(row)}"} for row in rows]
        if good:
            found = self.postprocess(self.inference(super().preprocess([{"body": rows[each]} for each in good])))
            for position, answer in zip(good, found):
                answers[position] = answer
        for position, answer in enumerate(answers):
            if "error" in answer:
                context.set_response_status(code=422, phrase="Wrong length", idx=position)
            elif max(answer["probabilities"]) < 0.5:
                context.set_response_status(code=203, idx=position)
            context.set_response_header(position, "X-Model", "rows")
        return answers
