"""An evaluation task of a user that does not work: what training must outlive."""

from vlp.eval.tasks import Common

__all__ = ["Common"]
