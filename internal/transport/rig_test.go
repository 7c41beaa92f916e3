// This file is what the tests need: a certificate authority, upstreams, dialers.

package transport

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/caddytls" // CA pools
)

// patience is the deadline of everything that must happen.
const patience = 20 * time.Second

// upstream listens and gives every connection to serve, and closes it after. The
// test fails if one is left at its end.
func upstream(t *testing.T, network, address string, serve func(conn net.Conn)) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { // ends when the listener is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			serving.Go(func() { // ends with serve, at the latest by the deadline
				defer conn.Close()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		serving.Wait()
	})
	return l.Addr().String()
}

// secure returns a serve that echoes over TLS, and what it learns from the
// handshakes that succeed.
func secure(config *tls.Config) (serve func(net.Conn), states <-chan tls.ConnectionState) {
	got := make(chan tls.ConnectionState, 16) // more than any test makes
	return func(conn net.Conn) {
		server := tls.Server(conn, config)
		if server.Handshake() != nil {
			return
		}
		got <- server.ConnectionState()
		_, _ = io.Copy(server, server)
		_ = server.Close()
	}, got
}

func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// checkEcho sends text and wants it back.
func checkEcho(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != text {
		t.Fatalf("echo: got %q, want %q", got, text)
	}
}

// checkGone wants the other side to have closed the connection.
func checkGone(t *testing.T, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("got a connection that is still open, want it closed")
	}
}

// context returns one that the test's deadline and end bound.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// parse reads TLS settings from the lines of a Caddyfile.
func parse(lines string) (*reverseproxy.TLSConfig, error) {
	d := caddyfile.NewTestDispenser("websocket_proxy {\n" + lines + "\n}")
	d.Next()
	var settings *reverseproxy.TLSConfig
	for d.NextBlock(0) {
		known, err := ParseTLS(d, &settings)
		if err != nil {
			return nil, err
		}
		if !known {
			return nil, d.Errf("unrecognized subdirective %q", d.Val())
		}
	}
	return settings, nil
}

// mustParse is parse for lines that are right, by way of JSON.
func mustParse(t *testing.T, lines string) *reverseproxy.TLSConfig {
	t.Helper()
	settings, err := parse(lines)
	if err != nil {
		t.Fatal(err)
	}
	asJSON, err := json.Marshal(settings)
	if err != nil {
		t.Fatal(err)
	}
	var again *reverseproxy.TLSConfig
	if err := caddy.StrictUnmarshalJSON(asJSON, &again); err != nil {
		t.Fatal(err)
	}
	return again
}

// newDialer makes a dialer of the lines of a Caddyfile.
func newDialer(t *testing.T, lines, proxyProtocol string) *Dialer {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	d, err := New(ctx, patience, mustParse(t, lines), proxyProtocol)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// checkError wants err to contain want.
func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error: got %v, want one with %q", err, want)
	}
}
