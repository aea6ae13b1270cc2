"""`ee-watch`: retrains and rolls when the records or the monitor demand it."""
