// This file has backends behind TLS: who is trusted, who is not, and what the client
// gets and the log says then.

package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// private returns settings that trust the authority and show a certificate of it, and
// what a backend has that wants one. The backend's own is for names.
func private(t testing.TB, a *testca.Authority, names ...string) (settings string, conf *tls.Config) {
	t.Helper()
	a.Issue(t, "proxy", "proxy.test")
	return fmt.Sprintf("tls_trust_pool file %s\n tls_client_auth %s %s\n", a.File("ca.crt"), a.File("proxy.crt"), a.File("proxy.key")),
		&tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", names...)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.Pool()}
}

// tlsBackend is a rawBackend behind TLS.
func tlsBackend(t testing.TB, conf *tls.Config, serve script) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptRaw(ln, serve, done)
	return ln.Addr().String()
}

// greets tells, in the answer's headers, what it learned by TLS, and echoes.
func greets(r *http.Request, c *rawConn) {
	var name, client string
	if secured, ok := c.Conn.(*tls.Conn); ok {
		state := secured.ConnectionState()
		name = state.ServerName
		for _, cert := range state.PeerCertificates {
			client = cert.Subject.CommonName
		}
		_ = c.accept(r, "X-Secure: yes\r\nX-Server-Name: "+name+"\r\nX-Client: "+client+"\r\n")
	} else {
		_ = c.accept(r, "X-Secure: no\r\n")
	}
	echoFrames(c)
}

// pathed is a client's handshake for another path than that of rawUpgrade.
func pathed(host, path, extra string) string {
	return strings.Replace(rawUpgrade(host, extra), "/chat?x=1", path, 1)
}

// Whom the proxy trusts, and by which name; who trusts the proxy. Without trust there is
// no connection, and the error says why.
func TestBackendsBehindTLS(t *testing.T) {
	ca, stranger := testca.New(t), testca.New(t)
	byIP := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "ip", "127.0.0.1")}}
	byName := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "name", "right.test")}}
	private := &tls.Config{Certificates: byIP.Certificates, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool()}
	ca.Issue(t, "proxy", "proxy.test")
	stranger.Issue(t, "stranger", "stranger.test")
	trust := "tls_trust_pool file " + ca.File("ca.crt")
	pair := func(a *testca.Authority, name string) string {
		return "\n tls_client_auth " + a.File(name+".crt") + " " + a.File(name+".key")
	}
	tests := []struct {
		name, scheme string
		backend      *tls.Config
		settings     string
		server       string // the name that the backend was asked for
		client       string // whom the backend has seen
		why          string // the error; "": there is none
	}{
		{"pool of a file", "wss://", byIP, trust, "", "", ""},
		{"https is wss", "https://", byIP, trust, "", "", ""},
		{"TLS by a setting alone", "", byIP, trust, "", "", ""},
		{
			"pool in the config", "wss://", byIP,
			"tls_trust_pool inline {\n trust_der " + base64.StdEncoding.EncodeToString(ca.Cert.Raw) + "\n}", "", "", "",
		},
		{"name", "wss://", byName, trust + "\n tls_server_name right.test", "right.test", "", ""},
		{"name of the request", "wss://", byName, trust + "\n tls_server_name {header.X-Tenant}.test", "right.test", "", ""},
		{"nobody is asked for a certificate", "wss://", byIP, trust + pair(ca, "proxy"), "", "", ""},
		{"client certificate", "wss://", private, trust + pair(ca, "proxy"), "", "proxy", ""},
		{"no verification", "wss://", byName, "tls_insecure_skip_verify", "", "", ""},
		{"no verification, with a name", "wss://", byName, "tls_insecure_skip_verify\n tls_server_name wrong.test", "wrong.test", "", ""},

		{"wrong name", "wss://", byName, trust + "\n tls_server_name wrong.test", "", "", "certificate is valid for right.test, not wrong.test"},
		{"wrong address", "wss://", &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "other", "192.0.2.1")}}, trust, "", "", "certificate is valid for 192.0.2.1, not 127.0.0.1"},
		{"wrong name of the request", "wss://", byIP, trust + "\n tls_server_name {header.X-Tenant}.test", "", "", "certificate is not valid for any names, but wanted to match right.test"},
		{"empty name of the request", "wss://", byIP, trust + "\n tls_server_name {header.X-Nothing}", "", "", `tls_server_name "{http.request.header.X-Nothing}" is empty`},
		{"authority that is not trusted", "wss://", byIP, "tls_trust_pool file " + stranger.File("ca.crt"), "", "", "certificate signed by unknown authority"},
		{"no pool", "wss://", byIP, "", "", "", "certificate signed by unknown authority"},
		{"no client certificate", "wss://", private, trust, "", "", "certificate required"},
		{"client certificate of a stranger", "wss://", private, trust + pair(stranger, "stranger"), "", "", "unknown certificate authority"},
		{"backend without TLS", "wss://", nil, trust, "", "", "TLS handshake with "},
	}
	site, addrs := "", make([]string, len(tests))
	for i, tt := range tests {
		if tt.backend != nil {
			addrs[i] = tlsBackend(t, tt.backend, greets)
		} else {
			addrs[i] = rawBackend(t, greets)
		}
		site += fmt.Sprintf("handle /%d {\n websocket_proxy %s%s {\n %s\n}\n}\n", i, tt.scheme, addrs[i], tt.settings)
	}
	p := startCaddy(t, "", site+"handle_errors {\n respond \"{err.message}\"\n}")
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := fmt.Sprint("/", i)
			res, c := rawRequest(t, p.addr, pathed(p.addr, path, "X-Tenant: right\r\n"))
			if tt.why == "" {
				if res.StatusCode != http.StatusSwitchingProtocols {
					t.Fatalf("got %d %q, want 101", res.StatusCode, body(t, res))
				}
				if got := res.Header; got.Get("X-Secure") != "yes" || got.Get("X-Server-Name") != tt.server || got.Get("X-Client") != tt.client {
					t.Errorf("backend: got %v, want server name %q, client %q", got, tt.server, tt.client)
				}
				checkEcho(t, c)
				return
			}
			got := body(t, res)
			if res.StatusCode != http.StatusBadGateway || !strings.Contains(got, " "+addrs[i]+": ") || !strings.Contains(got, tt.why) {
				t.Errorf("got %d %q, want 502 and an error that names %s and has %q", res.StatusCode, got, addrs[i], tt.why)
			}
			p.emptyWithin(t, soon)
		})
	}
}

// A client learns no more than 502; the log has the name that was wanted and the one
// that is there.
func TestWrongNameIsLogged(t *testing.T) {
	ca := testca.New(t)
	backend := tlsBackend(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "name", "right.test")}}, greets)
	p := startBinary(t, "", fmt.Sprintf("websocket_proxy wss://%s {\n tls_trust_pool file %s\n tls_server_name wrong.test\n}", backend, ca.File("ca.crt")))
	res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
	if got := body(t, res); res.StatusCode != http.StatusBadGateway || got != "" {
		t.Errorf("got %d %q, want 502 without a body", res.StatusCode, got)
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	<-p.exited
	want := "dialing " + backend + ": TLS handshake with " + backend + ": tls: failed to verify certificate: x509: certificate is valid for right.test, not wrong.test"
	if got := p.log.String(); !strings.Contains(got, want) {
		t.Errorf("log: got %s, want %q in it", got, want)
	}
}

// Upstreams with and without TLS are one pool. TLS without settings trusts whom the
// system trusts, which is why this runs the binary.
func TestPoolOfBothSchemes(t *testing.T) {
	ca := testca.New(t)
	conf := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "ip", "127.0.0.1")}}
	t.Setenv("SSL_CERT_FILE", ca.File("ca.crt"))
	upstreams := []string{
		"wss://" + tlsBackend(t, conf, greets), "ws://" + rawBackend(t, greets),
		"https://" + tlsBackend(t, conf, greets), rawBackend(t, greets),
	}
	p := startBinary(t, "", "websocket_proxy "+strings.Join(upstreams, " ")+" {\n lb_policy round_robin\n health_ws\n}")
	got := make(map[string]int)
	for range 20 {
		res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
		if res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("status: got %d, want 101", res.StatusCode)
		}
		got[res.Header.Get("X-Secure")]++
		c.send(t, ws.OpText, "hello")
		c.wantText(t, "hello")
	}
	if got["yes"] != 10 || got["no"] != 10 {
		t.Errorf("connections over TLS: got %v, want 10 of each", got)
	}
	by := p.stats(t).ByUpstream
	for _, u := range upstreams {
		if by[u] != 5 {
			t.Errorf("connections to %s: got %d, want 5", u, by[u])
		}
	}
}
