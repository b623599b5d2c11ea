# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
