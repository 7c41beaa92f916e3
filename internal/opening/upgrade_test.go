package opening

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// hijackable is a client's response writer. told is called when it has its status.
type hijackable struct {
	http.ResponseWriter
	header http.Header
	conn   net.Conn
	told   func()
	err    error // of Hijack
}

func (w *hijackable) Header() http.Header              { return w.header }
func (w *hijackable) WriteHeader(int)                  { w.told() }
func (w *hijackable) SetWriteDeadline(time.Time) error { return nil }

func (w *hijackable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return w.conn, bufio.NewReadWriter(bufio.NewReader(w.conn), nil), w.err
}

// A client that has its 101 has a connection that can be moved, though the session
// may not have it yet. If there never is a session, the caller is told no.
func TestMoveAsTheClientIsTold(t *testing.T) {
	for _, test := range []struct {
		name   string
		hijack error
		want   error
	}{
		{"in good order", nil, nil},
		{"nothing to take over", errors.New("no"), session.ErrNotMovable},
	} {
		t.Run(test.name, func(t *testing.T) {
			reg := registry.New()
			b := &backend{status: http.StatusSwitchingProtocols}
			p := &testPool{
				route: reg.Retain(registry.WebSocket, "route"), backends: map[string]*backend{"a": b, "b": b}, names: []string{"a", "b"}, concurrency: 64,
			}
			o := admit(t, reg, p)
			if err := o.rec.Move(); !errors.Is(err, session.ErrNotMovable) {
				t.Fatalf("before the 101: got %v, want %v", err, session.ErrNotMovable)
			}
			a := reach(t, o, p)
			near, far := net.Pipe()
			defer far.Close()
			moved := make(chan error, 1)
			w := &hijackable{header: make(http.Header), conn: near, err: test.hijack, told: func() {
				go func() { moved <- o.rec.Move() }()
				time.Sleep(20 * time.Millisecond) // it should come while there is no session
			}}
			s, err := a.Upgrade(o, w, clientRequest(t), new(handshake.Headers).Down(clientRequest(t)), p, nil)
			if !errors.Is(err, test.hijack) {
				t.Fatalf("got %v, want %v", err, test.hijack)
			}
			if s == nil {
				o.Close()
			}
			if err := <-moved; !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if s != nil {
				s.Abort()
				s.Run()
			}
		})
	}
}
