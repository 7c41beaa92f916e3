// This file tests taking connections over from net/http's own server.

package hijack

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// wrapper is a handler's writer, as Caddy's access log has one.
type wrapper struct {
	http.ResponseWriter
	status int
}

func (w *wrapper) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *wrapper) WriteHeader(status int) {
	w.status = status
	w.Header().Set("X-Wrapper", "seen")
	w.ResponseWriter.WriteHeader(status)
}

func (w *wrapper) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return nil, nil, errors.New("taken from the wrapper, want the innermost writer")
}

const request = "GET / HTTP/1.1\r\nHost: example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

// echo takes the connection over and sends everything back, including what was
// early, until the client finishes.
func echo(t *testing.T) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Upgrade"] = []string{"websocket"}
		w.Header()["Connection"] = []string{"Upgrade"}
		w.Header()["Sec-WebSocket-Accept"] = []string{"spelled so"}
		inner := &wrapper{ResponseWriter: w}
		outer := &wrapper{ResponseWriter: inner}
		conn, early, err := SwitchProtocols(outer)
		if err != nil {
			t.Errorf("got error %v, want the connection", err)
			return
		}
		if outer.status != http.StatusSwitchingProtocols || inner.status != http.StatusSwitchingProtocols {
			t.Errorf("got status %d and %d at the wrappers, want 101", outer.status, inner.status)
		}
		go func() { // ends with the client; owns the connection
			defer conn.Close()
			_, _ = conn.Write(early)
			_, _ = io.Copy(conn, conn)
		}()
	})
}

func TestSwitchProtocols(t *testing.T) {
	for _, test := range []struct {
		name         string
		secure       bool
		writeTimeout time.Duration
	}{
		{name: "plain"},
		{name: "TLS", secure: true},
		{name: "write timeout of the server passed", writeTimeout: 1},
	} {
		for early, payload := range map[string]string{"nothing early": "", "early bytes": "\x81\x05early"} {
			t.Run(test.name+"/"+early, func(t *testing.T) {
				s := httptest.NewUnstartedServer(echo(t))
				s.Config.WriteTimeout = test.writeTimeout
				if test.secure {
					s.StartTLS()
				} else {
					s.Start()
				}
				t.Cleanup(s.Close)
				conn, err := net.Dial("tcp", s.Listener.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				if test.secure {
					pool := s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
					conn = tls.Client(conn, &tls.Config{RootCAs: pool, ServerName: "example.com", NextProtos: []string{"http/1.1"}})
				}
				t.Cleanup(func() { _ = conn.Close() })
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				if _, err := io.WriteString(conn, request+payload); err != nil {
					t.Fatal(err)
				}
				br := bufio.NewReader(conn)
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Sec-Websocket-Accept") != "spelled so" || res.Header.Get("X-Wrapper") != "seen" {
					t.Errorf("got %d with %v, want 101 and what handlers set", res.StatusCode, res.Header)
				}
				if res.Header.Get("Upgrade") != "websocket" || res.Header.Get("Connection") != "Upgrade" {
					t.Errorf("got Upgrade %q, Connection %q, want them as set", res.Header["Upgrade"], res.Header["Connection"])
				}
				expect(t, br, payload)
				if _, err := io.WriteString(conn, "later"); err != nil {
					t.Fatal(err)
				}
				expect(t, br, "later")
			})
		}
	}
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("got %q, error %v, want %q", got, err, want)
	}
}

// Nothing is sent where the connection cannot be taken.
func TestWhatCannotBeTaken(t *testing.T) {
	rec := httptest.NewRecorder()
	if conn, _, err := SwitchProtocols(&wrapper{ResponseWriter: rec}); conn != nil || !errors.Is(err, http.ErrNotSupported) {
		t.Errorf("recorder: got %v, error %v, want ErrNotSupported", conn, err)
	}
	if rec.Code == http.StatusSwitchingProtocols {
		t.Error("recorder: got a 101 for a connection that was not taken")
	}

	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if conn, _, err := SwitchProtocols(&wrapper{ResponseWriter: w}); conn != nil || !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("HTTP/2: got %v, error %v, want ErrNotSupported", conn, err)
		}
		w.WriteHeader(http.StatusTeapot)
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	res, err := s.Client().Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.ProtoMajor != 2 || res.StatusCode != http.StatusTeapot {
		t.Errorf("got %s over %s, want what the handler says after the refusal over HTTP/2", res.Status, res.Proto)
	}
}
