"""The one exception users see: what was found, what was expected, what to do next."""


class QKGuardError(Exception):
    """A refusal or a failed check, in one readable line.

    The CLI prints it without a traceback and exits with code 2. Inside training it stops the run on all ranks
    where the reference is wrong, and is logged where only a probe, tracker or restored write failed.
    """


class UnknownLayoutError(QKGuardError):
    """Where queries and keys sit in a model could not be established for certain."""


class RearrangedError(QKGuardError):
    """transformers cuts or joins tensors while loading, so that parameters have no tensor of their own on disk."""


class WrongReferenceError(QKGuardError):
    """The pre-SFT reference is missing, damaged or another run's: never continued on."""


class RankLostError(QKGuardError):
    """Another rank gave no sign of life: nothing that needs all ranks can go on."""
