// This file tests how attempts to connect end that come to nothing.

package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

func TestConnectingIsBounded(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	d, err := New(ctx, 1, nil, "") // a nanosecond, which is over before it begins
	if err != nil {
		t.Fatal(err)
	}
	address := upstream(t, "tcp", "127.0.0.1:0", echo)
	_, err = d.Dial(testContext(t), Request{Network: "tcp", Address: address})
	checkError(t, err, "dial tcp "+address+": i/o timeout")
	checkTimeout(t, err, true)
}

func TestRefusedConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	_, err = newDialer(t, "tls", "v2").Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
	checkError(t, err, "dial tcp "+address+": connect: connection refused")
	checkTimeout(t, err, false)
}

// A handshake that gets no answer ends with the caller's context or tls_timeout,
// whichever is first.
func TestHandshakeIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		lines string
		given time.Duration
		want  time.Duration
	}{
		"by the context":                    {"tls", 3 * time.Second, 3 * time.Second},
		"by tls_timeout":                    {"tls\ntls_timeout 2s", time.Minute, 2 * time.Second},
		"by the context before tls_timeout": {"tls_timeout 1m", time.Second, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDialer(t, c.lines, "")
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), c.given)
				defer cancel()
				near, far := net.Pipe()
				defer near.Close()
				defer far.Close()
				began := time.Now()
				_, err := d.handshake(ctx, near, &tls.Config{ServerName: "backend.example"})
				if took := time.Since(began); took != c.want {
					t.Errorf("took: got %s, want %s", took, c.want)
				}
				checkTimeout(t, err, true)
				checkGone(t, far)
			})
		})
	}
}

// A peer that does not take the header, which no socket does, is not waited for.
func TestHeaderIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		began := time.Now()
		err := send(ctx, near, []byte("PROXY UNKNOWN\r\n"))
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("took: got %s, want 3s", took)
		}
		checkTimeout(t, err, true)
		checkGone(t, far)
	})
}

// The context's end after the header leaves the connection alone, as it is the
// caller's then.
func TestConnectionOutlivesTheContext(t *testing.T) {
	ca := testca.New(t)
	serve, _ := secure(&tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "127.0.0.1")}})
	tlsAddress := upstream(t, "tcp", "127.0.0.1:0", serve)
	plainAddress := upstream(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
		if _, err := io.ReadFull(conn, make([]byte, len("PROXY UNKNOWN\r\n"))); err == nil {
			echo(conn)
		}
	})
	for name, c := range map[string]struct {
		d *Dialer
		r Request
	}{
		"TLS":   {newDialer(t, "tls_trust_pool file "+ca.File("ca.crt")+"\ntls_timeout 10s", ""), Request{Network: "tcp", Address: tlsAddress, TLS: true}},
		"plain": {newDialer(t, "tls", "v1"), Request{Network: "tcp", Address: plainAddress}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			conn, err := c.d.Dial(ctx, c.r)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			cancel()
			checkEcho(t, conn, "still there")
		})
	}
}

func TestCancelClosesAtOnce(t *testing.T) {
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	closed := make(chan struct{})
	address := upstream(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
		_, _ = io.ReadFull(conn, make([]byte, 100)) // of the ClientHello, which gets no answer
		cancel()
		checkGone(t, conn)
		close(closed)
	})
	_, err := newDialer(t, "tls", "").Dial(ctx, Request{Network: "tcp", Address: address, TLS: true})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error: got %v, want %v", err, context.Canceled)
	}
	checkError(t, err, "TLS handshake with "+address+": ")
	<-closed
}

// Every failure after connecting closes the socket, and says what failed.
func TestFailureClosesTheSocket(t *testing.T) {
	ca := testca.New(t)
	config := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "backend.example")}}
	for name, c := range map[string]struct {
		serve func(conn net.Conn)
		lines string
		want  string
	}{
		"no TLS at all": {
			func(conn net.Conn) { _, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n") }, "tls",
			"TLS handshake with %: tls: first record does not look like a TLS handshake",
		},
		"wrong certificate": {
			func(conn net.Conn) { _ = tls.Server(conn, config).Handshake() },
			"tls_trust_pool file " + ca.File("ca.crt"),
			"TLS handshake with %: tls: failed to verify certificate: x509: cannot validate certificate for 127.0.0.1",
		},
		"closed at once": {func(net.Conn) {}, "tls", "TLS handshake with %: "},
	} {
		t.Run(name, func(t *testing.T) {
			closed := make(chan struct{})
			address := upstream(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
				c.serve(conn)
				_ = conn.(*net.TCPConn).CloseWrite()
				checkGone(t, conn)
				close(closed)
			})
			_, err := newDialer(t, c.lines, "").Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
			checkError(t, err, strings.ReplaceAll(c.want, "%", address))
			<-closed
		})
	}
}

func TestHeaderToClosedPeer(t *testing.T) {
	near, far := net.Pipe()
	_ = far.Close()
	defer near.Close()
	if err := send(t.Context(), near, []byte("PROXY")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("error: got %v, want %v", err, io.ErrClosedPipe)
	}
}

// checkTimeout wants err to be a timeout or not, as its callers tell them apart.
func checkTimeout(t *testing.T, err error, want bool) {
	t.Helper()
	var timeout net.Error
	if got := errors.As(err, &timeout) && timeout.Timeout(); got != want {
		t.Errorf("timeout: got %t of error %v, want %t", got, err, want)
	}
	if want && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error: got %v, want a deadline that was exceeded", err)
	}
}
