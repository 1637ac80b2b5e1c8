"""``raydiv data check``: the content of a data set, its errors, its overlap with evaluation prompts, and examples."""

from raydiv.commands.data_check.check import DataReport, check_data
from raydiv.commands.data_check.page import write_page

__all__ = ["DataReport", "check_data", "write_page"]
