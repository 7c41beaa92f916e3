// This file tests PROXY headers: what they say, and where they stand.

package transport

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// bufferedConn is a connection of which some bytes were read already.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// received is what came first on a connection.
type received struct {
	header *proxyproto.Header
	err    error
}

// behind returns a serve that takes one header off and leaves the rest to next:
// a second one would break it.
func behind(next func(net.Conn)) (serve func(net.Conn), headers <-chan received) {
	got := make(chan received, 16) // more than any test makes
	return func(conn net.Conn) {
		br := bufio.NewReader(conn)
		header, err := proxyproto.Read(br)
		got <- received{header, err}
		next(&bufferedConn{conn, br})
	}, got
}

func TestProxyHeader(t *testing.T) {
	ca := testca.New(t)
	config := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "127.0.0.1")}}
	lines := "tls_trust_pool file " + ca.File("ca.crt")
	tlvs := []proxyproto.TLV{
		{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("ws.example.com")},
		{Type: proxyproto.PP2_TYPE_ALPN, Value: []byte("h2")},
	}
	for name, c := range map[string]struct {
		client   string // empty: none
		from, to string // empty: the header has none
	}{
		"IPv4":                       {"192.0.2.1:4711", "192.0.2.1:4711", "0.0.0.0:0"},
		"IPv6":                       {"[2001:db8::1]:4711", "[2001:db8::1]:4711", "[::]:0"},
		"IPv6 without its zone":      {"[fe80::1%eth0]:4711", "[fe80::1]:4711", "[::]:0"},
		"an IPv4-mapped one is IPv4": {"[::ffff:192.0.2.1]:4711", "192.0.2.1:4711", "0.0.0.0:0"},
		"no port":                    {"192.0.2.1:0", "192.0.2.1:0", "0.0.0.0:0"},
		"no client":                  {},
	} {
		for _, version := range []string{"v1", "v2"} {
			for _, secured := range []bool{false, true} {
				over := " in clear"
				next := echo
				if secured {
					over = " before TLS"
					next, _ = secure(config)
				}
				t.Run(name+", "+version+over, func(t *testing.T) {
					serve, headers := behind(next)
					address := upstream(t, "tcp", "127.0.0.1:0", serve)
					r := Request{Network: "tcp", Address: address, TLS: secured, TLVs: tlvs}
					if c.client != "" {
						r.Client = netip.MustParseAddrPort(c.client)
					}
					conn, err := newDialer(t, lines, version).Dial(testContext(t), r)
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					checkEcho(t, conn, "what comes after")
					got := <-headers
					if got.err != nil {
						t.Fatal(got.err)
					}
					checkHeader(t, got.header, version, c.from, c.to, tlvs)
				})
			}
		}
	}
}

func checkHeader(t *testing.T, h *proxyproto.Header, version, from, to string, tlvs []proxyproto.TLV) {
	t.Helper()
	if got := "v" + string('0'+rune(h.Version)); got != version {
		t.Errorf("version: got %s, want %s", got, version)
	}
	if got, want := h.Command.IsLocal(), from == ""; got != want {
		t.Errorf("local: got %t, want %t", got, want)
	}
	for _, a := range []struct {
		side string
		got  net.Addr
		want string
	}{{"source", h.SourceAddr, from}, {"destination", h.DestinationAddr, to}} {
		got := ""
		if a.got != nil {
			got = a.got.String()
		}
		if got != a.want {
			t.Errorf("%s: got %q, want %q", a.side, got, a.want)
		}
	}
	if version == "v1" {
		tlvs = nil
	}
	if got, err := h.TLVs(); err != nil || !reflect.DeepEqual(got, tlvs) {
		t.Errorf("TLVs: got %v, error %v, want %v", got, err, tlvs)
	}
}

func TestNoProxyHeaderByDefault(t *testing.T) {
	serve, headers := behind(echo)
	address := upstream(t, "tcp", "127.0.0.1:0", serve)
	conn, err := newDialer(t, "tls", "").Dial(testContext(t), Request{Network: "tcp", Address: address, Client: netip.MustParseAddrPort("192.0.2.1:1")})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkEcho(t, conn, "nothing before this")
	if got := <-headers; got.err != proxyproto.ErrNoProxyProtocol {
		t.Errorf("got header %v, error %v, want none", got.header, got.err)
	}
}

// A server that speaks first is not waited for, and its first bytes are the
// caller's.
func TestHeaderDoesNotWait(t *testing.T) {
	address := upstream(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
		_, _ = io.WriteString(conn, "welcome")
		_, _ = io.Copy(io.Discard, conn)
	})
	conn, err := newDialer(t, "tls", "v1").Dial(testContext(t), Request{Network: "tcp", Address: address})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make([]byte, len("welcome"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "welcome" {
		t.Errorf("got %q, error %v, want %q", got, err, "welcome")
	}
}

func TestHeaderThatCannotBe(t *testing.T) {
	_, err := newDialer(t, "tls", "v2").Dial(testContext(t), Request{
		Network: "tcp", Address: "127.0.0.1:1", TLVs: []proxyproto.TLV{{Type: proxyproto.PP2_TYPE_NOOP, Value: make([]byte, 1<<16)}},
	})
	checkError(t, err, "PROXY header for 127.0.0.1:1: ")
}
