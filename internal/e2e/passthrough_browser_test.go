// This file has WebSockets over TLS that pass through a proxy without a certificate:
// those of a browser, and those of the README's config.

package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// A browser talks with a backend that has the certificate. The proxy has none, and no key
// with which it could read along. (Covers K7.)
func TestPassthroughBrowser(t *testing.T) {
	a := testca.New(t)
	const name = "wss.test"
	cert := a.Issue(t, name, name)
	srv := wssServer(t, cert)
	srv.StartTLS()
	p, addr := startLayer4(t, "", toSNI(name, srv.Listener.Addr().String()))
	// Started after the proxy, it leaves before: it keeps connections as it likes.
	g := browserGuest{nodeGuest{startNode(
		t, "browser.cjs", tool(t, "chromium"), "--host-resolver-rules=MAP "+name+" 127.0.0.1",
		"--ignore-certificate-errors-spki-list="+keyHash(t, cert), // no other key will do
	)}}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, port, _ := net.SplitHostPort(addr)
	origin := "https://" + net.JoinHostPort(name, port)
	var shown struct{ SubjectName, Issuer string }
	if err := g.node.call(ctx, "visit", map[string]string{"url": origin + "/"}, &shown); err != nil {
		t.Fatal(err)
	}
	if shown.SubjectName != name || shown.Issuer != "ca" {
		t.Errorf("certificate: got %+v, want that of %s by ca", shown, name)
	}
	p.wantNoTLS(t)
	if _, err := g.open(ctx, target{URL: strings.Replace(origin, "https", "wss", 1) + "/echo"}); err != nil {
		t.Fatal(err)
	}
	const rounds = 120
	var sent uint64
	for i := range rounds {
		for _, kind := range []string{"text", "binary"} {
			m := content{Kind: kind, Size: i * i}
			want := m.message()
			if got, err := g.echo(ctx, m); err != nil || got != want {
				t.Fatalf("echo of %+v: got %+v, %v; want %+v", m, got, err, want)
			}
			sent += uint64(m.Size)
		}
	}
	// The handshakes, and the headers of frames and records.
	most := sent + sent/100 + 2*rounds*64 + 16<<10
	c := slices.MaxFunc(p.connections(t), func(a, b connection) int { return int(a.BytesIn) - int(b.BytesIn) })
	if c.BytesIn < sent || c.BytesIn > most || c.BytesOut < sent || c.BytesOut > most {
		t.Errorf("bytes: got %d in, %d out, want between %d and %d each", c.BytesIn, c.BytesOut, sent, most)
	}
	if c.Kind != "passthrough" || c.State != "open" || c.MessagesIn+c.MessagesOut > 0 {
		t.Errorf("connection: got %+v, want an open tunnel that counts no messages", c)
	}
	bye := ending{Code: 3000, Reason: "bye", Clean: true}
	if got, err := g.close(ctx, bye); err != nil || got != bye {
		t.Errorf("close: got %+v, %v; want the backend's echo of %+v", got, err, bye)
	}
}

// The README's config passes WebSockets to backends that read its PROXY header, and whose
// health it checks. (Covers K26.)
func TestPassthroughOfREADME(t *testing.T) {
	const name = "ws.example.com"
	a := testca.New(t)
	cert := a.Issue(t, name, name)
	srv := wssServer(t, cert)
	headers := make(chan *proxyproto.Header, 100)
	srv.Listener = &proxyproto.Listener{
		Listener:          srv.Listener,
		ConnPolicy:        func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil },
		ValidateHeader:    func(h *proxyproto.Header) error { headers <- h; return nil },
		ReadHeaderTimeout: 10 * time.Second,
	}
	srv.StartTLS()
	backend := srv.Listener.Addr().String()
	_, port, _ := net.SplitHostPort(backend)

	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	sample := regexp.MustCompile("(?s)```caddyfile\n\\{\n(\tlayer4 \\{\n.*?\n)\\}\n```").FindSubmatch(readme)
	if sample == nil {
		t.Fatal("the README shows no layer4 config")
	}
	addr := freeAddr(t)
	own := []string{"10.0.0.1:443", backend, "\t:443", addr, "{l4.tls.server_name}:8443", "localhost:" + port, "9443", port}
	for i := 0; i < len(own); i += 2 {
		if !strings.Contains(string(sample[1]), own[i]) {
			t.Fatalf("the README's config has no %s:\n%s", own[i], sample[1])
		}
	}
	p := startCaddy(t, strings.NewReplacer(own...).Replace(string(sample[1])), "respond ok")
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: a.Pool()},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return d.DialContext(ctx, network, addr)
		},
	}}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, res, err := websocket.Dial(ctx, "wss://"+name+"/echo", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if res.TLS == nil || !slices.Equal(res.TLS.PeerCertificates[0].Raw, cert.Certificate[0]) {
		t.Error("the client does not see the backend's certificate")
	}
	p.wantNoTLS(t)
	for _, m := range []content{{Kind: "text", Size: 1000}, {Kind: "binary", Size: 30000}} {
		if err := c.Write(ctx, coderType(m.Kind), m.bytes()); err != nil {
			t.Fatal(err)
		}
		if got, err := readCoder(ctx, c); err != nil || received(got.kind, got.data) != m.message() {
			t.Errorf("echo of %+v: got %d bytes, %v", m, len(got.data), err)
		}
	}
	if got := p.connections(t)[0]; got.Route != "passthrough" || got.Client != "127.0.0.1" {
		t.Errorf("connection: got %+v, want one of the route passthrough", got)
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Errorf("close: %v", err)
	}
	h := <-headers
	for h.Command == proxyproto.LOCAL { // of health checks
		h = <-headers
	}
	tlvs, err := h.TLVs()
	if !slices.ContainsFunc(tlvs, func(v proxyproto.TLV) bool { return v.Type == proxyproto.PP2_TYPE_AUTHORITY && string(v.Value) == name }) {
		t.Errorf("PROXY header: got %q, %v; want %s among it", tlvs, err, name)
	}
	for _, v := range p.views(t) {
		if !v.Healthy {
			t.Errorf("upstream: got %+v, want a healthy one", v)
		}
	}
}

// wssServer is a coderBackend that shows browsers a page, and whose certificate is for
// clients to see. It is to be started with TLS.
func wssServer(t testing.TB, cert tls.Certificate) *httptest.Server {
	t.Helper()
	srv := newCoderServer(t)
	talks := srv.Config.Handler
	srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			talks.ServeHTTP(w, r)
		}
	})
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	return srv
}

// keyHash is how Chromium names the key of a certificate.
func keyHash(t testing.TB, cert tls.Certificate) string {
	t.Helper()
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// wantNoTLS wants that nothing in the running config is about certificates.
func (p *proxy) wantNoTLS(t testing.TB) {
	t.Helper()
	var config struct{ Apps map[string]any }
	p.call(t, http.MethodGet, "/config/", &config)
	if config.Apps["tls"] != nil || config.Apps["layer4"] == nil {
		t.Errorf("apps: got %v, want layer4 and no tls", config.Apps)
	}
}
