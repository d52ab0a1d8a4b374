"""Why a run can't begin or go on."""

from common.errors import UserError


class RunError(UserError):
    """The run can't go on; the message says why and what to do."""
