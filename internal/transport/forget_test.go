// This file tests that a live TLS connection does not keep the config of its
// handshake.

package transport

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"runtime"
	"testing"
	"time"
	"weak"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// dialAndForgetDialer returns a connection whose dialer is garbage, and a weak
// reference to what the dialer's config, and every copy of it, refers to.
func dialAndForgetDialer(t *testing.T, address, lines string) (net.Conn, weak.Pointer[x509.CertPool]) {
	t.Helper()
	d := newDialer(t, lines, "")
	d.tls.RootCAs = d.tls.RootCAs.Clone() // the other is the module's, which the test keeps
	conn, err := d.Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn, weak.Make(d.tls.RootCAs)
}

// A config is free while a connection made by it lives on.
func TestConnectionKeepsNoConfig(t *testing.T) {
	ca := testca.New(t)
	backend := ca.Issue(t, "backend", "127.0.0.1")
	for name, c := range map[string]struct {
		version     uint16
		lines       string
		renegotiate bool
	}{
		"TLS 1.2": {version: tls.VersionTLS12},
		"TLS 1.3": {version: tls.VersionTLS13},
		// Renegotiation is a handshake, but TLS 1.3 has none.
		"TLS 1.2 that may renegotiate": {version: tls.VersionTLS12, lines: "tls_renegotiation once", renegotiate: true},
		"TLS 1.3 that may renegotiate": {version: tls.VersionTLS13, lines: "tls_renegotiation freely"},
	} {
		t.Run(name, func(t *testing.T) {
			serve, _ := secure(&tls.Config{Certificates: []tls.Certificate{backend}, MaxVersion: c.version})
			conn, pool := dialAndForgetDialer(t, upstream(t, "tcp", "127.0.0.1:0", serve),
				"tls_trust_pool file "+ca.File("ca.crt")+"\n"+c.lines)
			checkEcho(t, conn, "before")
			if c.renegotiate {
				for range 5 {
					runtime.GC()
				}
				if pool.Value() == nil {
					t.Error("got the config free, want it kept for renegotiation")
				}
				runtime.KeepAlive(conn)
				return
			}
			for until := time.Now().Add(patience); pool.Value() != nil; runtime.GC() {
				if time.Now().After(until) {
					t.Fatal("got the config kept in memory, want it free")
				}
			}
			checkEcho(t, conn, "after")
			if got := conn.(*tls.Conn).ConnectionState().Version; got != c.version {
				t.Errorf("version: got %x, want %x", got, c.version)
			}
		})
	}
}
