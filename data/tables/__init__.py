"""Sources of tables, series and texts from CSV and Parquet files.

`frame` reads files (`csv_file`), `column` says what a column holds, `targets` and `keys` read the columns that are no inputs.
"""

from hpo.data.tables.series import series
from hpo.data.tables.table import table
from hpo.data.tables.text import text

__all__ = ["series", "table", "text"]
