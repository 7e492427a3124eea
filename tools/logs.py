"""What a server writes to stderr: lines for people, or one JSON object per line for programs."""

import json
import logging
import time

OURS = ("engine", "kernels", "rpc", "tools")


def configure(level: str, as_json: bool) -> None:
    """Our own modules log from `level` on, everybody else's only from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())


class PlainFormatter(logging.Formatter):
    """`12:34:56 message`; what is not information says its level."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno != logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """`time` in ISO 8601, UTC; `trace` where an exception was logged."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
