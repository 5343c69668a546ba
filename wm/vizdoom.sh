#!/bin/sh
# ViZDoom's engine, tied to the process whose game it is: it would wait for that one's orders for
# ever if it were killed. Linux ends it then where setpriv can ask for that; whether the game is still
# there is looked at afterwards, so that no moment is left out. Elsewhere the engine just starts.
if setpriv --pdeathsig KILL true 2>/dev/null; then
    exec setpriv --pdeathsig KILL \
        sh -c '[ "$PPID" = "$WM_GAME" ] && exec "$WM_ENGINE" "$@"' vizdoom "$@"
fi
exec "$WM_ENGINE" "$@"
