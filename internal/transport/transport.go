// Package transport connects to upstreams: by TCP or a Unix socket, then with a
// header of the PROXY protocol, then with TLS, the latter two if they are wanted.
package transport

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Dialer connects to upstreams. It is immutable and safe for concurrent use.
type Dialer struct {
	connector  net.Dialer
	proxy      byte          // version of the PROXY protocol; 0: none
	tls        *tls.Config   // only ever cloned
	tlsTimeout time.Duration // of the TLS handshake; 0: as long as the caller's context
	except     []string      // ports that get no TLS
}

// Request says whom to connect to, and for whom.
type Request struct {
	Network, Address string // as net.Dialer takes them

	// TLS asks for TLS, which the ports of tls_except_ports do not get even so.
	TLS bool
	// Replace replaces the placeholders of a configured TLS server name. Without
	// it the name is taken as it stands.
	Replace func(string) string

	// Client is whom the PROXY header names. Without one the connection is the
	// proxy's own, like a health check's.
	Client netip.AddrPort
	// TLVs go into the PROXY header; its version 1 has no room for them.
	TLVs []proxyproto.TLV
}

// New returns a dialer. The timeout is for connecting, which includes looking a
// name up. Without TLS settings, upstreams that want TLS get the defaults.
func New(ctx caddy.Context, timeout time.Duration, settings *reverseproxy.TLSConfig, proxyProtocol string) (*Dialer, error) {
	if err := Check(settings, proxyProtocol); err != nil {
		return nil, err
	}
	d := &Dialer{connector: net.Dialer{Timeout: timeout}, proxy: proxyVersions[proxyProtocol], tls: new(tls.Config)}
	if settings != nil {
		own := *settings // loading the module of a field empties the field
		config, err := own.MakeTLSClientConfig(ctx)
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		if config != nil { // which it is when nothing is set
			d.tls = config
		}
		d.tlsTimeout, d.except = time.Duration(own.HandshakeTimeout), own.ExceptPorts
	}
	d.tls.NextProtos = []string{"http/1.1"} // no other version has the Upgrade header
	return d, nil
}

// Dial connects to an upstream. If it fails or ctx ends, the socket is closed.
func (d *Dialer) Dial(ctx context.Context, r Request) (net.Conn, error) {
	config, err := d.config(r)
	if err != nil {
		return nil, fmt.Errorf("TLS with %s: %w", r.Address, err)
	}
	header, err := d.header(r)
	if err != nil {
		return nil, fmt.Errorf("PROXY header for %s: %w", r.Address, err)
	}
	conn, err := d.connector.DialContext(ctx, r.Network, r.Address)
	if err != nil {
		return nil, err // it says what was dialed
	}
	if header != nil {
		if err := send(ctx, conn, header); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("sending PROXY header to %s: %w", r.Address, err)
		}
	}
	if config == nil {
		return conn, nil
	}
	secured, err := d.handshake(ctx, conn, config)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("TLS handshake with %s: %w", r.Address, err)
	}
	return secured, nil
}

// send writes the first bytes of a connection, which is closed when ctx ends.
func send(ctx context.Context, conn net.Conn, p []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	_, err := conn.Write(p)
	if !stop() {
		return ctx.Err() // also when the write came first: the connection is closed
	}
	return err
}
