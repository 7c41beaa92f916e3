// This file tests probes over real sockets: TCP, TLS, and a WebSocket library.

package health

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// to is a target at an address.
func to(address, host string) Target {
	return Target{Host: host, Dial: func(ctx context.Context, port string) (net.Conn, error) {
		if port != "" {
			address = net.JoinHostPort("127.0.0.1", port)
		}
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}}
}

// layer4 is the probe of settings for TCP backends.
func layer4(t *testing.T, a *ActiveLayer4) Probe {
	t.Helper()
	p, err := a.Compile()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// listen returns a listener that accepts nothing by itself.
func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// secure starts a TLS server that notes the server names it is asked for.
func secure(t *testing.T, config *tls.Config) (address string, names chan string) {
	t.Helper()
	names = make(chan string, 10)
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		names <- hello.ServerName
		return nil, nil
	}
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = config
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), names
}

func TestTCP(t *testing.T) {
	ln := listen(t)
	if err := layer4(t, &ActiveLayer4{TCP: true})(t.Context(), to(ln.Addr().String(), "app")); err != nil {
		t.Error(err)
	}
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || len(got) != 0 {
		t.Errorf("got %q, %v, want a connection that is closed without a byte", got, err)
	}
	_ = ln.Close()
	compare(t, layer4(t, &ActiveLayer4{TCP: true})(t.Context(), to(ln.Addr().String(), "app")), "health_tcp: dial tcp")
	// The same is refused for all others.
	for _, check := range []string{"health_ws", "health_http"} {
		compare(t, compiled(t, check)(t.Context(), to(ln.Addr().String(), "app")), check+": dial tcp")
	}
	compare(t, layer4(t, &ActiveLayer4{TLS: new(TLSCheck)})(t.Context(), to(ln.Addr().String(), "app")), "health_tls: dial tcp")
}

func TestPortReplacesTheUpstreams(t *testing.T) {
	ln := listen(t)
	port := ln.Addr().(*net.TCPAddr).Port
	if err := layer4(t, &ActiveLayer4{TCP: true, Port: &port})(t.Context(), to("127.0.0.1:1", "app")); err != nil {
		t.Error(err)
	}
}

// The certificate of the backend, which nobody trusts, does not matter.
func TestTLS(t *testing.T) {
	for _, test := range []struct{ name, serverName, host, want string }{
		{"given", "given.example.com", "app:443", "given.example.com"},
		{"host", "", "app.example.com", "app.example.com"},
		{"host with a port", "", "app.example.com:443", "app.example.com"},
		{"IPv4", "", "192.0.2.1:443", ""},
		{"IPv6", "", "[2001:db8::1]:443", ""},
		{"IPv6 without a port", "", "[2001:db8::1]", ""},
		{"path of a socket", "", "/run/app.sock", "localhost"},
		{"none", "", "", "localhost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			address, names := secure(t, new(tls.Config))
			p := layer4(t, &ActiveLayer4{TCP: true, TLS: &TLSCheck{ServerName: test.serverName}})
			if err := p(t.Context(), to(address, test.host)); err != nil {
				t.Fatal(err)
			}
			if got := <-names; got != test.want {
				t.Errorf("got server name %q, want %q", got, test.want)
			}
		})
	}
}

func TestTLSVersionsAndClientCertificates(t *testing.T) {
	for _, test := range []struct {
		name   string
		config *tls.Config
		want   string
	}{
		{"TLS 1.0", &tls.Config{MaxVersion: tls.VersionTLS10, MinVersion: tls.VersionTLS10}, ""},
		{"certificate wanted, TLS 1.3", &tls.Config{ClientAuth: tls.RequireAnyClientCert}, ""},
		{"certificate wanted, TLS 1.2", &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12}, "health_tls: TLS handshake: remote error"},
	} {
		t.Run(test.name, func(t *testing.T) {
			address, _ := secure(t, test.config)
			compare(t, layer4(t, &ActiveLayer4{TLS: new(TLSCheck)})(t.Context(), to(address, "app")), test.want)
		})
	}
}

func TestTLSFailsWithoutAnswer(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	p := layer4(t, &ActiveLayer4{TLS: new(TLSCheck)})
	compare(t, p(t.Context(), to(plain.Listener.Addr().String(), "app")), "health_tls: TLS handshake: tls: first record does not look like a TLS handshake")

	silent := listen(t) // the kernel connects, nobody answers
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	compare(t, p(ctx, to(silent.Addr().String(), "app")), "health_tls: TLS handshake: context deadline exceeded")
}

// A library's server sees a WebSocket that comes and goes as it should.
func TestWebSocketLibraryHasNothingToComplainOf(t *testing.T) {
	statuses := make(chan websocket.StatusCode, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		_ = c.Write(r.Context(), websocket.MessageText, []byte(strings.Repeat("x", 100_000)))
		_, _, err = c.Read(r.Context())
		statuses <- websocket.CloseStatus(err)
	}))
	defer s.Close()
	if err := compiled(t, "health_ws")(t.Context(), to(s.Listener.Addr().String(), "app")); err != nil {
		t.Error(err)
	}
	if got := <-statuses; got != websocket.StatusNormalClosure {
		t.Errorf("got status %d, want 1000", got)
	}
}
