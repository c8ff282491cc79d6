"""The errors of hf_daq. Each is also a ValueError and says what was passed, what is allowed and what to write."""


class DaqError(ValueError):
    """Base of every error raised on purpose by hf_daq."""


class ConfigError(DaqError):
    """A `DaqConfig` value, key or rule is not valid."""


class ModelError(DaqError):
    """A model cannot be patched as it is: already patched, wrapped, tied, or nothing in it to quantize."""


class CalibrationError(DaqError):
    """A quantizer is used before calibration, was never reached by it, or saw values that are not finite."""


class CheckpointError(DaqError):
    """A saved file or its metadata is damaged, does not fit the model, or comes from a newer format."""


class ExportError(DaqError):
    """An exported file does not give what the model gives, or a model cannot be exported."""


class HubError(DaqError):
    """A repository of the Hub is not there, may not be read or written, or was not reached."""


class DataError(DaqError):
    """A data set cannot be opened, or has no rows that a model takes."""
