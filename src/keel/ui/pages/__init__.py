"""One module a page of the navigation: its `router` answers under `/NAME`, `TITLE` and `ORDER` put it into the menu."""
