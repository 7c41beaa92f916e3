// This file tests how probes connect: as clients' connections do.

package e2e

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
)

// certificate returns TLS settings of a backend at a loopback address, and a file with
// the certificate that vouches for it.
func certificate(t testing.TB) (conf *tls.Config, file string) {
	t.Helper()
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	file = filepath.Join(t.TempDir(), "backend.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: s.TLS.Certificates, MinVersion: tls.VersionTLS12}, file
}

// A probe has the TLS settings of the pool, and begins, as a connection that is nobody's
// but the proxy's, with a PROXY header without addresses.
func TestProbeConnection(t *testing.T) {
	conf, file := certificate(t)
	for _, tt := range []struct {
		name             string
		tls              bool // of the backend
		version          byte // of the PROXY header that the backend must get; 0: none
		scheme, settings string
		healthy          bool
	}{
		{"plain", false, 0, "ws", "", true},
		{"TLS", true, 0, "wss", "tls_trust_pool file " + file, true},
		{"TLS by setting", true, 0, "", "tls\n tls_trust_pool file " + file, true},
		{"TLS unverified", true, 0, "https", "tls_insecure_skip_verify", true},
		{"TLS of an unknown CA", true, 0, "wss", "", false},
		{"TLS of another name", true, 0, "wss", "tls_server_name other.test\n tls_trust_pool file " + file, false},
		{"no TLS to a TLS backend", true, 0, "ws", "", false},
		{"PROXY v1", false, 1, "ws", "proxy_protocol v1", true},
		{"PROXY v2", false, 2, "ws", "proxy_protocol v2", true},
		{"PROXY v2 and TLS", true, 2, "wss", "proxy_protocol v2\n tls_trust_pool file " + file, true},
		{"PROXY header missing", false, 2, "ws", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			if tt.version != 0 {
				ln = &proxyproto.Listener{Listener: ln, ConnPolicy: func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil }}
			}
			if tt.tls {
				ln = tls.NewListener(ln, conf)
			}
			b := newPatient()
			heads := make(chan *proxyproto.Header, 10)
			for _, path := range []string{"/health", "/ok", "/chat"} {
				b.answer(path, func(r *http.Request, c *rawConn) {
					heads <- proxyHeader(c.Conn)
					if path == "/ok" {
						answers(response(200, ""))(r, c)
						return
					}
					echoRaw(r, c)
				})
			}
			b.listen(t, ln)
			to := b.addr
			if tt.scheme != "" {
				to = tt.scheme + "://" + to
			}
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n %s\n %s health_ws /health\n health_http /ok\n}", to, tt.settings, schedule(time.Hour, 5*time.Second, 1, 1)))
			if !tt.healthy {
				p.waitHealth(t, slack, map[string]bool{to: false})
				return
			}
			for range 2 { // of the first round: both checks
				select {
				case head := <-heads:
					if tt.version != 0 && (head == nil || head.Version != tt.version || head.Command != proxyproto.LOCAL && head.TransportProtocol != proxyproto.UNSPEC) {
						t.Errorf("PROXY header of a probe: got %+v, want version %d without addresses", head, tt.version)
					}
				case <-time.After(5*time.Second + slack):
					t.Fatal("no probe came")
				}
			}
			c, _ := p.letIn(t)
			if head := <-heads; tt.version != 0 && (head == nil || head.SourceAddr.String() != c.LocalAddr().String()) {
				t.Errorf("PROXY header of a client: got %+v, want its address %v", head, c.LocalAddr())
			}
			p.waitHealth(t, 0, map[string]bool{to: true})
			r := b.asked("/health")[0]
			if r.Host != b.addr {
				t.Errorf("Host of a probe: got %q, want %q", r.Host, b.addr)
			}
			c.Close()
		})
	}
}

// proxyHeader returns what a connection began with, nil if that was no PROXY header.
func proxyHeader(conn net.Conn) *proxyproto.Header {
	if secured, ok := conn.(*tls.Conn); ok {
		conn = secured.NetConn()
	}
	if proxied, ok := conn.(*proxyproto.Conn); ok {
		return proxied.ProxyHeader()
	}
	return nil
}
