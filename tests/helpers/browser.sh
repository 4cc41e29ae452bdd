#!/bin/sh
# The browser that chromedriver starts. The shell has no window, no extensions and no start page, and takes a third of
# the CPU time of a whole Chromium; it opens no page by itself, for which chromedriver waits.
if command -v chromium-headless-shell >/dev/null; then
    exec chromium-headless-shell "$@" about:blank
fi
exec chromium "$@"
