// Package hijack takes a client's connection over from Caddy's HTTP server in
// such a way that it keeps nothing of the server, the request, or the config.
package hijack

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// SwitchProtocols sends the client a 101 with the header that w has, and returns
// its connection and what the server had read of it already.
//
// The status goes through every handler's wrapper, as they expect, but the
// connection is taken from the innermost writer: what Caddy's access log and
// metrics return counts bytes into a recorder that reaches the whole server. The
// server's write deadline, which a long handshake with the backend may have
// passed, is lifted first: a flush of a handler would fail on it.
func SwitchProtocols(w http.ResponseWriter) (net.Conn, []byte, error) {
	if err := http.NewResponseController(w).SetWriteDeadline(time.Time{}); err != nil {
		return nil, nil, fmt.Errorf("lifting the write deadline: %w", err)
	}
	hj, ok := innermost(w).(http.Hijacker)
	if !ok {
		return nil, nil, fmt.Errorf("hijacking a %T: %w", innermost(w), http.ErrNotSupported)
	}
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, brw, err := hj.Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("hijacking: %w", err)
	}
	// The reader itself hangs on the server's connection: only its bytes are kept.
	var early []byte
	if n := brw.Reader.Buffered(); n > 0 {
		early = make([]byte, n)
		_, _ = brw.Reader.Read(early) // it is all there
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("lifting deadlines: %w", err)
	}
	if t, ok := conn.(*tls.Conn); ok {
		sock.ForgetTLSConfig(t)
	}
	return conn, early, nil
}

// FailWrites fails what is being written to the client now. It may be called at any
// time until the handler returns: it passes by the deadlines of handlers' wrappers, which
// are their own goroutine's.
func FailWrites(w http.ResponseWriter) {
	_ = http.NewResponseController(innermost(w)).SetWriteDeadline(time.Unix(1, 0))
}

// innermost returns the server's own writer.
func innermost(w http.ResponseWriter) http.ResponseWriter {
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return w
		}
		w = u.Unwrap()
	}
}
