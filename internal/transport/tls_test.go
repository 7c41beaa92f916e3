// This file tests whom TLS takes for an upstream, and what the upstream sees.

package transport

import (
	"crypto/tls"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

func TestTLS(t *testing.T) {
	ca := testca.New(t)
	backend := ca.Issue(t, "backend", "backend.example", "localhost", "127.0.0.1")
	nameless := ca.Issue(t, "nameless", "nameless.example")
	ca.Issue(t, "proxy")
	trust := "tls_trust_pool file " + ca.File("ca.crt") + "\n"

	type seen struct {
		sni, alpn, client string
		curve             tls.CurveID
	}
	for name, c := range map[string]struct {
		lines   string
		host    string // default: the loopback's IP address
		server  *tls.Config
		replace func(string) string
		want    seen
		err     string
	}{
		"the address's name is sent and verified": {
			lines: trust, host: "localhost", want: seen{sni: "localhost"},
		},
		"an IP address is verified, but not sent": {
			lines: trust,
		},
		"an IP address that is not in the certificate": {
			lines: trust, server: &tls.Config{Certificates: []tls.Certificate{nameless}},
			err: "certificate for 127.0.0.1 because it doesn't contain any IP SANs",
		},
		"the configured name is sent and verified": {
			lines: trust + "tls_server_name backend.example", want: seen{sni: "backend.example"},
		},
		"a wrong name is told with the right one": {
			lines: trust + "tls_server_name other.example",
			err:   "certificate is valid for backend.example, localhost, not other.example",
		},
		"placeholders of the name are replaced": {
			lines: trust + "tls_server_name {name}.example", want: seen{sni: "backend.example"},
			replace: func(s string) string { return strings.ReplaceAll(s, "{name}", "backend") },
		},
		"a name that comes out empty is not replaced by the address's": {
			lines: trust + "tls_server_name {name}", host: "localhost",
			replace: func(string) string { return "" }, err: `tls_server_name "{name}" is empty`,
		},
		"without a configured name there is nothing to replace": {
			lines: trust, host: "localhost", want: seen{sni: "localhost"},
			replace: func(s string) string { return s + "replaced" },
		},
		"the system's authorities by default": {
			lines: "tls", err: "certificate signed by unknown authority",
		},
		"nothing is verified if that is wanted": {
			lines: "tls_insecure_skip_verify", host: "localhost", want: seen{sni: "localhost"},
		},
		"a client certificate": {
			lines: trust + "tls_client_auth " + ca.File("proxy.crt") + " " + ca.File("proxy.key"),
			server: &tls.Config{
				ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
			},
			want: seen{client: "proxy"},
		},
		"no client certificate": { // TLS 1.3 would tell it with the first read
			lines:  trust,
			server: &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12},
			err:    "handshake failure",
		},
		"only the curves that are listed": {
			lines: trust + "tls_curves secp384r1", want: seen{curve: tls.CurveP384},
		},
	} {
		t.Run(name, func(t *testing.T) {
			config := c.server
			if config == nil {
				config = new(tls.Config)
			}
			if config.Certificates == nil {
				config.Certificates = []tls.Certificate{backend}
			}
			config.NextProtos = []string{"h2", "http/1.1"}
			serve, states := secure(config)
			address := upstream(t, "tcp", "127.0.0.1:0", serve)
			if c.host != "" {
				_, port, _ := net.SplitHostPort(address)
				address = net.JoinHostPort(c.host, port)
			}
			conn, err := newDialer(t, c.lines, "").Dial(testContext(t),
				Request{Network: "tcp4", Address: address, TLS: true, Replace: c.replace})
			if c.err != "" {
				checkError(t, err, c.err)
				checkError(t, err, "with "+address)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			checkEcho(t, conn, "echo")
			state := <-states
			got := seen{sni: state.ServerName, alpn: state.NegotiatedProtocol}
			if len(state.PeerCertificates) > 0 {
				got.client = state.PeerCertificates[0].Subject.CommonName
			}
			if c.want.curve != 0 {
				got.curve = state.CurveID
			}
			c.want.alpn = "http/1.1" // although the server would rather have h2
			if got != c.want {
				t.Errorf("the upstream saw %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestTLSOnlyWhereItIsWanted(t *testing.T) {
	address := upstream(t, "tcp", "127.0.0.1:0", echo)
	_, port, _ := net.SplitHostPort(address)
	for name, c := range map[string]struct {
		lines string
		want  bool
	}{
		"not wanted":       {"tls", false},
		"port is excepted": {"tls_except_ports 1 " + port, true},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := newDialer(t, c.lines, "").Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: c.want})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			checkEcho(t, conn, "in clear")
		})
	}
}

// An upstream may want TLS, by its scheme, where no setting is about TLS.
func TestDefaultsVerify(t *testing.T) {
	serve, _ := secure(&tls.Config{Certificates: []tls.Certificate{testca.New(t).Issue(t, "backend", "127.0.0.1")}})
	address := upstream(t, "tcp", "127.0.0.1:0", serve)
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	d, err := New(ctx, patience, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
	checkError(t, err, "TLS handshake with "+address+": tls: failed to verify certificate: x509: certificate signed by unknown authority")
}

func TestUnixSocket(t *testing.T) {
	ca := testca.New(t)
	serve, states := secure(&tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "backend.example")}})
	path := upstream(t, "unix", filepath.Join(t.TempDir(), "a:443"), serve)
	trust := "tls_trust_pool file " + ca.File("ca.crt") + "\n"
	for name, c := range map[string]struct{ lines, sni, err string }{
		"with a server name":               {lines: trust + "tls_server_name backend.example", sni: "backend.example"},
		"nothing to verify":                {lines: "tls_insecure_skip_verify"},
		"nothing to verify it by":          {lines: trust, err: "TLS with " + path + ": a Unix socket has no name to verify: tls_server_name must say it"},
		"what looks like a port is a path": {lines: "tls_insecure_skip_verify\ntls_except_ports 443"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := newDialer(t, c.lines, "").Dial(testContext(t), Request{Network: "unix", Address: path, TLS: true})
			if c.err != "" {
				checkError(t, err, c.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			checkEcho(t, conn, "echo")
			if state := <-states; state.ServerName != c.sni {
				t.Errorf("SNI: got %q, want %q", state.ServerName, c.sni)
			}
		})
	}
}

// Connections that are made at the same time go each by a name of its own.
func TestConnectionsShareNoName(t *testing.T) {
	ca := testca.New(t)
	var names []string
	for i := range 8 {
		names = append(names, fmt.Sprintf("b%d.example", i))
	}
	serve, states := secure(&tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", names...)}})
	address := upstream(t, "tcp", "127.0.0.1:0", serve)
	d := newDialer(t, "tls_trust_pool file "+ca.File("ca.crt")+"\ntls_server_name {name}", "")
	var dialing sync.WaitGroup
	for _, name := range names {
		dialing.Go(func() {
			conn, err := d.Dial(testContext(t), Request{
				Network: "tcp", Address: address, TLS: true, Replace: func(string) string { return name },
			})
			if err != nil {
				t.Error(err)
				return
			}
			_ = conn.Close()
		})
	}
	dialing.Wait()
	seen := make(map[string]bool)
	for range names {
		seen[(<-states).ServerName] = true
	}
	if len(seen) != len(names) {
		t.Errorf("got names %v, want all of %v", seen, names)
	}
}

// Loading a module takes it out of the settings: a second dialer of the same ones
// must not trust the system's authorities instead.
func TestSettingsServeSeveralDialers(t *testing.T) {
	ca := testca.New(t)
	serve, _ := secure(&tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "127.0.0.1")}})
	address := upstream(t, "tcp", "127.0.0.1:0", serve)
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	settings := mustParse(t, "tls_trust_pool file "+ca.File("ca.crt"))
	for range 2 {
		d, err := New(ctx, patience, settings, "")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := d.Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
	}
}
