# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the programs in pipelines/, conversion/ and training/ share. The library imports none of it."""
