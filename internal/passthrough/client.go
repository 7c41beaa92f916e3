// Package passthrough takes a client over from caddy-l4: who it is, what it has
// sent already, and its connection, in such a way that it keeps nothing of the
// server, the matching, or the config.
package passthrough

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/mholt/caddy-l4/layer4"
	"github.com/pires/go-proxyproto"
)

// serverName is where caddy-l4's tls matcher leaves what it has read.
const serverName = "l4.tls.server_name"

// past is a deadline that ends a read before it begins.
var past = time.Unix(1, 0)

// Client is a client whose connection was matched.
type Client struct {
	Addr       netip.AddrPort // as a PROXY header says, if there was one; zero for a client without an IP
	ServerName string         // that it asked for
	cx         *layer4.Connection
	early      []byte // of a detachable connection only: others are read through cx
}

// NewClient returns a client. What matching has read of it, and it sent since, is
// taken out of a connection that can be detached.
func NewClient(cx *layer4.Connection) (*Client, error) {
	c := &Client{cx: cx}
	if addr, ok := cx.RemoteAddr().(interface{ AddrPort() netip.AddrPort }); ok { // a header may name another protocol than TCP
		ap := addr.AddrPort()
		c.Addr = netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	c.ServerName, _ = cx.Replacer().GetString(serverName)
	if socket(cx) == nil {
		return c, cx.SetDeadline(time.Time{})
	}
	var err error
	if c.early, err = buffered(cx); err != nil {
		return nil, err
	}
	if c.ServerName == "" { // it was not matched by its TLS
		if hello := readHello(c.early); hello != nil {
			c.ServerName = hello.ServerName
		}
	}
	return c, nil
}

// IP is the client's address as text, "" if it has none.
func (c *Client) IP() string {
	if !c.Addr.IsValid() {
		return ""
	}
	return c.Addr.Addr().String()
}

// TLVs are what the PROXY protocol says of the client beside its address.
func (c *Client) TLVs() (tlvs []proxyproto.TLV) {
	if c.ServerName != "" {
		tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(c.ServerName)})
	}
	if hello := readHello(c.early); hello != nil && len(hello.SupportedProtos) > 0 {
		tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_ALPN, Value: []byte(hello.SupportedProtos[0])})
	}
	return tlvs
}

// Detach returns the client's connection, which lives on its own when the handler has
// returned, with what was read of it. It returns false if that cannot be had: then the
// connection is caddy-l4's, and the handler must not return before its end.
func (c *Client) Detach() (conn net.Conn, early []byte, detached bool) {
	s := socket(c.cx)
	if s == nil {
		return c.cx, nil, false
	}
	// A duplicate of the descriptor: caddy-l4 closes its own, which ends nothing.
	file, err := s.File()
	if err == nil {
		conn, err = net.FileConn(file)
		_ = file.Close()
	}
	if err != nil { // not every system can
		return &prefixed{Conn: c.cx, early: c.early}, nil, false
	}
	return conn, c.early, true
}

// filer is a socket of which there can be two descriptors.
type filer interface {
	net.Conn
	File() (*os.File, error)
}

// socket returns the TCP or Unix socket of a connection whose bytes are those on the
// wire, or nil: what another handler has put in between may change them.
func socket(conn net.Conn) filer {
	for {
		switch c := conn.(type) {
		case *layer4.Connection:
			conn = c.Conn
		case *proxyproto.Conn:
			conn = c.Raw()
		case *net.TCPConn:
			return c
		case *net.UnixConn:
			return c
		default:
			return nil
		}
	}
}

// buffered takes out what a connection's wrappers have read, without reading its
// socket, and clears the deadlines.
func buffered(cx *layer4.Connection) ([]byte, error) {
	if err := cx.SetReadDeadline(past); err != nil {
		return nil, err
	}
	scratch := scratches.Get().(*[layer4.MaxBufLen]byte)
	defer scratches.Put(scratch)
	var early []byte
	for {
		n, err := cx.Read(scratch[:])
		early = append(early, scratch[:n]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return early, cx.SetDeadline(time.Time{})
		}
		if err != nil {
			return nil, fmt.Errorf("reading what was matched: %w", err)
		}
	}
}

// scratches are large enough for all that matching reads.
var scratches = sync.Pool{New: func() any { return new([layer4.MaxBufLen]byte) }}

// prefixed is a connection that begins with bytes that were read of it.
type prefixed struct {
	net.Conn
	early []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.early) == 0 {
		return p.Conn.Read(b)
	}
	n := copy(b, p.early)
	p.early = p.early[n:]
	return n, nil
}
