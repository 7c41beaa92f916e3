// This file tests connections that end before they are open, by either peer or by the
// admin API, and that soon nothing is left of them.

package e2e

import (
	"io"
	"net/http"
	"testing"
	"time"
)

// halfRefusal is an answer that the backend does not finish.
const halfRefusal = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 100\r\n\r\nwho"

// thinking is a backend that gives an answer, or a part of one, and waits for the
// end. asked has a value for every request, left one for every end.
func thinking(t testing.TB, answer string) (addr string, asked <-chan struct{}, left <-chan error) {
	a, l := make(chan struct{}, 1), make(chan error, 1)
	return rawBackend(t, func(_ *http.Request, c *rawConn) {
		_, _ = io.WriteString(c, answer)
		a <- struct{}{}
		_, err := c.br.ReadByte()
		l <- err
	}), a, l
}

// checkLeft checks that the backend's connection ends soon.
func checkLeft(t testing.TB, left <-chan error) {
	t.Helper()
	select {
	case err := <-left:
		if err == nil {
			t.Error("the upstream got a byte, want the end")
		}
	case <-time.After(soon):
		t.Error("the upstream was not left")
	}
}

// A client that leaves while the upstream thinks, or while its refusal is being
// passed on, is noticed, and the upstream is left at once.
func TestClientLeavesDuringHandshake(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		linger       int
	}{
		{"FIN before the answer", "", -1},
		{"RST before the answer", "", 0},
		{"FIN during a refusal", halfRefusal, -1},
		{"RST during a refusal", halfRefusal, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			backend, asked, left := thinking(t, tt.answer)
			p := startCaddy(t, "", "websocket_proxy "+backend)
			for range 5 { // some come at a bad moment
				conn := p.asking(t)
				<-asked
				if tt.answer != "" {
					if _, err := io.ReadFull(conn, make([]byte, 50)); err != nil { // it is being passed on
						t.Fatal(err)
					}
				}
				_ = conn.SetLinger(tt.linger)
				conn.Close()
				checkLeft(t, left)
			}
			p.emptyWithin(t, soon)
		})
	}
}

// The admin API ends what is not open yet.
func TestAdminEndsHandshake(t *testing.T) {
	for _, tt := range []struct{ name, answer, want string }{
		{"before the answer", "", "HTTP/1.1 503 "},
		{"during a refusal", halfRefusal, "HTTP/1.1 401 "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			backend, asked, left := thinking(t, tt.answer)
			p := startCaddy(t, "", "websocket_proxy "+backend)
			conn := p.asking(t)
			<-asked
			start := make([]byte, len(tt.want))
			if tt.answer != "" {
				_, _ = io.ReadFull(conn, start)
			}
			list := p.connections(t)
			if len(list) != 1 {
				t.Fatalf("connections: got %+v, want one", list)
			}
			if status := p.call(t, http.MethodDelete, "/connections/"+list[0].ID, nil); status != http.StatusNoContent {
				t.Errorf("status: got %d, want 204", status)
			}
			checkLeft(t, left)
			if tt.answer == "" {
				_, _ = io.ReadFull(conn, start)
			}
			if string(start) != tt.want {
				t.Errorf("got %q, want %q", start, tt.want)
			}
			p.emptyWithin(t, soon)
		})
	}
}

// Nor does a refusal last that the client does not read, however much of it there is.
func TestAdminEndsRefusalThatIsNotRead(t *testing.T) {
	full := make(chan struct{})
	backend := rawBackend(t, func(_ *http.Request, c *rawConn) {
		_, _ = io.WriteString(c, "HTTP/1.1 401 Unauthorized\r\n\r\n")
		for chunk, err := make([]byte, 1<<16), error(nil); err == nil; {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_, err = c.Write(chunk)
		}
		close(full)
		_, _ = c.br.ReadByte() // until the proxy leaves
	})
	p := startCaddy(t, "", "websocket_proxy "+backend)
	p.asking(t)
	<-full
	list := p.connections(t)
	if len(list) != 1 {
		t.Fatalf("connections: got %+v, want one", list)
	}
	if status := p.call(t, http.MethodDelete, "/connections/"+list[0].ID, nil); status != http.StatusNoContent {
		t.Errorf("status: got %d, want 204", status)
	}
	p.emptyWithin(t, 10*time.Second)
}
