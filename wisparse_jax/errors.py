"""The errors that bad input raises; each message names the file, tensor or field at fault."""


class WisparseError(ValueError):
    """Input that cannot be used: what was read, what was expected, what was found."""


class ConfigError(WisparseError):
    """A model or search configuration that cannot be used."""


class WeightsError(WisparseError):
    """Model weights that are missing, unexpected, mis-shaped, damaged or non-finite."""


class PlanError(WisparseError):
    """A sparsity plan that is damaged or does not belong to the model."""
