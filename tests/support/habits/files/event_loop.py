import asyncio
import threading

from rows_handler import RowsHandler


class EventLoop(RowsHandler):
    """A handler with an event loop in its own thread, from which the model is called."""

    def initialize(self, context):
        super().initialize(context)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever).start()

    async def answer(self, data):
        return await asyncio.to_thread(super().inference, data)

    def inference(self, data):
        return asyncio.run_coroutine_threadsafe(self.answer(data), self.loop).result()
