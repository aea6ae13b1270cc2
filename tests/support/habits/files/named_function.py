from rows_service import RowsService

_services = {}


def answer(data, context):
    if "rows" not in _services:
        _services["rows"] = RowsService()
        _services["rows"].initialize(context)
    if data is None:
        return None
    return _services["rows"].handle(data)
