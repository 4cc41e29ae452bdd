#!/bin/sh
# The browser that chromedriver starts. The shell has no window, no extensions and no start page, and takes a third of
# the CPU time of a whole Chromium; it opens no page by itself, for which chromedriver waits. A driver takes no browser
# of another version: the packages may be of different days.
major() { "$1" --version 2>/dev/null | sed -n 's/^[^0-9]*\([0-9]*\)\..*/\1/p'; }
shell=$(major chromium-headless-shell)
if [ -n "$shell" ] && [ "$shell" = "$(major chromedriver)" ]; then
    exec chromium-headless-shell "$@" about:blank
fi
exec chromium "$@"
