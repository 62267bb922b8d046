"""`diptych bench`: measure a server or a router over HTTP, figures and field names as SGLang's."""
