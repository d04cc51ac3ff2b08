"""What an edit does to one text, token by token: at its sites, and to what comes next."""

from .explain import Explanation, SiteExplanation, TokenChange, explain_edit


__all__ = ["Explanation", "SiteExplanation", "TokenChange", "explain_edit"]
